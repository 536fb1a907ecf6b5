"""AMQP 1.0: the front door of protocol adapters. Nothing outside this package knows what a frame is."""
