// A stock AMQP 1.0 client. Does what the JSON document on standard input says, prints one JSON document a line.
//
// {"connection": {...}, "tls": {"ca": FILE}, "receiver": {...}, "sender": {...}, "requests": [{...}], "drain": true}
//
// It opens the receiver, then the sender, sends the requests, and closes when all are answered: by a reply, or by an
// outcome other than accepted.

'use strict';

const fs = require('fs');
const rhea = require('rhea');

const task = JSON.parse(fs.readFileSync(0));
const options = Object.assign({ host: '127.0.0.1', reconnect: false, container_id: 'rhea' }, task.connection);
if (task.tls) {
    options.transport = 'tls';
    options.ca = [fs.readFileSync(task.tls.ca)];
    options.servername = 'localhost';
}

function print(document) {
    process.stdout.write(JSON.stringify(document) + '\n');
}

function condition(error) {
    return error ? { condition: error.condition, description: error.description } : null;
}

// {"ulong": 7} and the like stand for values that JSON has no type for.
function value(item) {
    if (item !== null && typeof item === 'object') {
        if ('ulong' in item) {
            return rhea.types.wrap_ulong(item.ulong);
        }
        if ('uuid' in item) {
            return rhea.string_to_uuid(item.uuid);
        }
        if ('int' in item) {
            return rhea.types.wrap_int(item.int);
        }
    }
    return item;
}

function shown(item) {
    return Buffer.isBuffer(item) ? { binary: item.toString('hex') } : item;
}

let unanswered = (task.requests || []).length;
let sender;
let next = 0;

function answered(connection) {
    unanswered -= 1;
    if (unanswered === 0) {
        connection.close();
    }
}

function sendMore() {
    while (next < task.requests.length && sender.sendable()) {
        const request = task.requests[next];
        const message = Object.assign({}, request);
        ['message_id', 'correlation_id'].forEach(function (name) {
            if (name in message) {
                message[name] = value(message[name]);
            }
        });
        if (message.application_properties) {
            Object.keys(message.application_properties).forEach(function (name) {
                message.application_properties[name] = value(message.application_properties[name]);
            });
        }
        if (typeof message.body === 'string') {
            message.body = rhea.message.data_section(Buffer.from(message.body));
        }
        next += 1;
        sender.send(message);
    }
}

const container = rhea.create_container();
container.on('connection_open', function (context) {
    print({ event: 'open', container: context.connection.container_id, frame: context.connection.max_frame_size });
    if (task.receiver) {
        context.connection.open_receiver(task.receiver);
    } else if (task.sender) {
        sender = context.connection.open_sender(task.sender);
    } else {
        context.connection.close();
    }
});
container.on('receiver_open', function (context) {
    if (!context.receiver.source || !context.receiver.source.address) {
        return; // refused: the error follows
    }
    print({ event: 'receiver', address: context.receiver.source.address });
    if (task.drain) {
        context.receiver.add_credit(10);
        context.receiver.drain_credit();
    } else if (task.sender) {
        sender = context.connection.open_sender(task.sender);
    }
});
container.on('receiver_drained', function (context) {
    print({ event: 'drained' });
    task.drain = false;
    context.receiver.drain = false; // rhea leaves it on
    context.receiver.add_credit(task.requests.length);
    sender = context.connection.open_sender(task.sender);
});
container.on('sendable', sendMore);
container.on('message', function (context) {
    const message = context.message;
    const body = message.body && message.body.content !== undefined ? message.body.content : message.body;
    print({
        event: 'reply',
        correlation_id: shown(message.correlation_id),
        content_type: message.content_type,
        to: message.to,
        application_properties: message.application_properties,
        body: body === undefined || body === null ? null : body.toString(),
        is_data: Boolean(message.body && message.body.typecode === 0x75),
    });
    answered(context.connection);
});
container.on('accepted', function () {
    print({ event: 'accepted' });
});
['rejected', 'released', 'modified'].forEach(function (outcome) {
    container.on(outcome, function (context) {
        print({ event: outcome, error: condition(context.delivery.remote_state.error) });
        answered(context.connection);
    });
});
['receiver_error', 'sender_error', 'session_error', 'connection_error'].forEach(function (name) {
    container.on(name, function (context) {
        const subject = context.receiver || context.sender || context.session || context.connection;
        print({ event: name, error: condition(subject.error || context.error) });
        context.connection.close();
    });
});
container.on('disconnected', function (context) {
    print({ event: 'disconnected', error: context.error ? String(context.error.message || context.error) : null });
    process.exitCode = 1;
});
container.on('connection_close', function () {
    print({ event: 'close' });
});
container.connect(options);
