-- What adapters keep for a while (amqp-apis 12); conventions as in the registry's own schema. Nothing here refers to
-- tenants or devices: it may lie in a file of its own, and is kept for whoever an adapter names.

CREATE TABLE device_connections (
    tenant_id TEXT NOT NULL,
    device_id TEXT NOT NULL,
    gateway_id TEXT,
    gateway_updated BIGINT,
    adapter_instance_id TEXT,
    -- NULL where there is an instance: it stays until it is removed.
    adapter_instance_expires BIGINT,
    PRIMARY KEY (tenant_id, device_id)
) WITHOUT ROWID;

-- No index on times: each update would write it, too. What has expired is found by walking through all.

CREATE TABLE connection_usage (
    tenant_id TEXT NOT NULL PRIMARY KEY,
    devices BIGINT NOT NULL
) WITHOUT ROWID;
