-- The registry's first schema on PostgreSQL.
--
-- Conventions, here and in later files:
--   * A statement ends with a semicolon at the end of its line; nothing else ends a line with one.
--   * Every table of what tenants own has tenant_id as the first column of its key, so that it can be distributed
--     by tenant. The few that are not (names that are unique across tenants, logins) are small.
--   * Instants are microseconds since 1970-01-01 UTC. Flags are 0 or 1. "document" is JSON text, kept as text so that it is given back exactly
--     (docs/decisions).
--   * Every text is compared by its code points (COLLATE "C"), whatever the database's own collation is.
--   * A fill factor leaves room in the pages of rows that are updated all the time, so that no index has to follow.
--   * No key refers from a device to its tenant: what a deleted tenant leaves behind stays until a tenant of that id
--     is created again (management 8.3).

CREATE TABLE tenants (
    tenant_id TEXT COLLATE "C" NOT NULL PRIMARY KEY,
    version TEXT COLLATE "C" NOT NULL,
    created BIGINT NOT NULL,
    updated BIGINT,
    document TEXT COLLATE "C" NOT NULL
);

-- An alias belongs to one tenant, a tenant has at most one (management 4.7).
CREATE TABLE tenant_aliases (
    alias TEXT COLLATE "C" NOT NULL PRIMARY KEY,
    tenant_id TEXT COLLATE "C" NOT NULL UNIQUE REFERENCES tenants (tenant_id)
);

-- Names of trust anchors, each with its one owner: "tenant:" and a tenant id, or "group:" and a trust anchor group.
-- A name stands here twice, as canonical key ("k:") and as RFC 2253 text ("s:"), because two names are equal if
-- either is (provisioning 7.6). Whoever uses a name refers to it together with the owner, so no two owners can use
-- one name, whatever happens side by side (management 4.7). The last user takes the name away.
CREATE TABLE trust_anchor_names (
    name TEXT COLLATE "C" NOT NULL PRIMARY KEY,
    owner TEXT COLLATE "C" NOT NULL,
    UNIQUE (name, owner)
);

CREATE TABLE trust_anchors (
    tenant_id TEXT COLLATE "C" NOT NULL REFERENCES tenants (tenant_id),
    name TEXT COLLATE "C" NOT NULL,
    owner TEXT COLLATE "C" NOT NULL,
    PRIMARY KEY (tenant_id, name),
    FOREIGN KEY (name, owner) REFERENCES trust_anchor_names (name, owner)
);

CREATE INDEX trust_anchors_by_name ON trust_anchors (name, owner);

-- What would cost more the more a tenant has, counted in the transaction that changes it.
CREATE TABLE tenant_usage (
    tenant_id TEXT COLLATE "C" NOT NULL PRIMARY KEY,
    devices BIGINT NOT NULL
) WITH (fillfactor = 20);

CREATE TABLE devices (
    tenant_id TEXT COLLATE "C" NOT NULL,
    device_id TEXT COLLATE "C" NOT NULL,
    version TEXT COLLATE "C" NOT NULL,
    created BIGINT NOT NULL,
    updated BIGINT,
    auto_provisioned SMALLINT NOT NULL DEFAULT 0,
    notification_sent SMALLINT NOT NULL DEFAULT 0,
    document TEXT COLLATE "C" NOT NULL,
    PRIMARY KEY (tenant_id, device_id)
);

-- The groups that a device is memberOf, for gateways by viaGroups.
CREATE TABLE device_groups (
    tenant_id TEXT COLLATE "C" NOT NULL,
    group_id TEXT COLLATE "C" NOT NULL,
    device_id TEXT COLLATE "C" NOT NULL,
    PRIMARY KEY (tenant_id, group_id, device_id),
    FOREIGN KEY (tenant_id, device_id) REFERENCES devices (tenant_id, device_id)
);

CREATE INDEX device_groups_by_device ON device_groups (tenant_id, device_id);

-- A device's credentials set exists from its creation on, mostly with members. No key refers to the device: with
-- lenient referential integrity (management 8.1) a set may be there first.
CREATE TABLE credential_sets (
    tenant_id TEXT COLLATE "C" NOT NULL,
    device_id TEXT COLLATE "C" NOT NULL,
    version TEXT COLLATE "C" NOT NULL,
    PRIMARY KEY (tenant_id, device_id)
);

CREATE TABLE credentials (
    tenant_id TEXT COLLATE "C" NOT NULL,
    type TEXT COLLATE "C" NOT NULL,
    auth_id TEXT COLLATE "C" NOT NULL,
    device_id TEXT COLLATE "C" NOT NULL,
    position INTEGER NOT NULL,
    document TEXT COLLATE "C" NOT NULL,
    PRIMARY KEY (tenant_id, type, auth_id),
    FOREIGN KEY (tenant_id, device_id) REFERENCES credential_sets (tenant_id, device_id)
);

CREATE INDEX credentials_by_device ON credentials (tenant_id, device_id, position);

-- Logins over AMQP (authentication 4). authorities is a JSON object of claims.
CREATE TABLE identities (
    name TEXT COLLATE "C" NOT NULL PRIMARY KEY,
    mechanism TEXT COLLATE "C" NOT NULL,
    password_hash TEXT COLLATE "C",
    authorities TEXT COLLATE "C" NOT NULL,
    created BIGINT NOT NULL
);

-- What has happened once and for all. "identities": there has been a login, so no first one is ever made again.
CREATE TABLE milestones (
    name TEXT COLLATE "C" NOT NULL PRIMARY KEY
);

-- What adapters keep for a while (amqp-apis 12). Nothing here refers to tenants or devices: it is kept for whoever an
-- adapter names. UNLOGGED: a restart of the database leaves it, a crash or a fail-over empties it, and adapters tell it
-- again; in return an update costs no write-ahead log.
CREATE UNLOGGED TABLE device_connections (
    tenant_id TEXT COLLATE "C" NOT NULL,
    device_id TEXT COLLATE "C" NOT NULL,
    gateway_id TEXT COLLATE "C",
    gateway_updated BIGINT,
    adapter_instance_id TEXT COLLATE "C",
    -- NULL where there is an instance: it stays until it is removed.
    adapter_instance_expires BIGINT,
    PRIMARY KEY (tenant_id, device_id)
) WITH (fillfactor = 70);

CREATE UNLOGGED TABLE connection_usage (
    tenant_id TEXT COLLATE "C" NOT NULL PRIMARY KEY,
    devices BIGINT NOT NULL
) WITH (fillfactor = 20);
