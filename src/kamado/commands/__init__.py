"""The commands that work on this machine or over AMQP; those over the management API are in `operate`."""
