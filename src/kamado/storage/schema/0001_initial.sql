-- The registry's first schema.
--
-- Conventions, here and in later files:
--   * A statement ends with a semicolon at the end of its line; nothing else ends a line with one.
--   * Every table of what tenants own has tenant_id as the first column of its key, so that it can be distributed
--     by tenant. The few that are not (names that are unique across tenants, logins) are small.
--   * Instants are microseconds since 1970-01-01 UTC. Flags are 0 or 1. "document" is JSON text.
--   * No key refers from a device to its tenant: what a deleted tenant leaves behind stays until a tenant of that id
--     is created again (management 8.3).

CREATE TABLE tenants (
    tenant_id TEXT NOT NULL PRIMARY KEY,
    version TEXT NOT NULL,
    created BIGINT NOT NULL,
    updated BIGINT,
    document TEXT NOT NULL
) WITHOUT ROWID;

-- An alias belongs to one tenant, a tenant has at most one (management 4.7).
CREATE TABLE tenant_aliases (
    alias TEXT NOT NULL PRIMARY KEY,
    tenant_id TEXT NOT NULL UNIQUE REFERENCES tenants (tenant_id)
) WITHOUT ROWID;

-- Names of trust anchors, each with its one owner: "tenant:" and a tenant id, or "group:" and a trust anchor group.
-- A name stands here twice, as canonical key ("k:") and as RFC 2253 text ("s:"), because two names are equal if
-- either is (provisioning 7.6). Whoever uses a name refers to it together with the owner, so no two owners can use
-- one name, whatever happens side by side (management 4.7). The last user takes the name away.
CREATE TABLE trust_anchor_names (
    name TEXT NOT NULL PRIMARY KEY,
    owner TEXT NOT NULL,
    UNIQUE (name, owner)
) WITHOUT ROWID;

CREATE TABLE trust_anchors (
    tenant_id TEXT NOT NULL REFERENCES tenants (tenant_id),
    name TEXT NOT NULL,
    owner TEXT NOT NULL,
    PRIMARY KEY (tenant_id, name),
    FOREIGN KEY (name, owner) REFERENCES trust_anchor_names (name, owner)
) WITHOUT ROWID;

CREATE INDEX trust_anchors_by_name ON trust_anchors (name, owner);

-- What would cost more the more a tenant has, counted in the transaction that changes it.
CREATE TABLE tenant_usage (
    tenant_id TEXT NOT NULL PRIMARY KEY,
    devices BIGINT NOT NULL
) WITHOUT ROWID;

CREATE TABLE devices (
    tenant_id TEXT NOT NULL,
    device_id TEXT NOT NULL,
    version TEXT NOT NULL,
    created BIGINT NOT NULL,
    updated BIGINT,
    auto_provisioned SMALLINT NOT NULL DEFAULT 0,
    notification_sent SMALLINT NOT NULL DEFAULT 0,
    document TEXT NOT NULL,
    PRIMARY KEY (tenant_id, device_id)
) WITHOUT ROWID;

-- The groups that a device is memberOf, for gateways by viaGroups.
CREATE TABLE device_groups (
    tenant_id TEXT NOT NULL,
    group_id TEXT NOT NULL,
    device_id TEXT NOT NULL,
    PRIMARY KEY (tenant_id, group_id, device_id),
    FOREIGN KEY (tenant_id, device_id) REFERENCES devices (tenant_id, device_id)
) WITHOUT ROWID;

CREATE INDEX device_groups_by_device ON device_groups (tenant_id, device_id);

-- A device's credentials set exists from its creation on, mostly with members. No key refers to the device: with
-- lenient referential integrity (management 8.1) a set may be there first.
CREATE TABLE credential_sets (
    tenant_id TEXT NOT NULL,
    device_id TEXT NOT NULL,
    version TEXT NOT NULL,
    PRIMARY KEY (tenant_id, device_id)
) WITHOUT ROWID;

CREATE TABLE credentials (
    tenant_id TEXT NOT NULL,
    type TEXT NOT NULL,
    auth_id TEXT NOT NULL,
    device_id TEXT NOT NULL,
    position INTEGER NOT NULL,
    document TEXT NOT NULL,
    PRIMARY KEY (tenant_id, type, auth_id),
    FOREIGN KEY (tenant_id, device_id) REFERENCES credential_sets (tenant_id, device_id)
) WITHOUT ROWID;

CREATE INDEX credentials_by_device ON credentials (tenant_id, device_id, position);

-- Logins over AMQP (authentication 4). authorities is a JSON object of claims.
CREATE TABLE identities (
    name TEXT NOT NULL PRIMARY KEY,
    mechanism TEXT NOT NULL,
    password_hash TEXT,
    authorities TEXT NOT NULL,
    created BIGINT NOT NULL
) WITHOUT ROWID;

-- What has happened once and for all. "identities": there has been a login, so no first one is ever made again.
CREATE TABLE milestones (
    name TEXT NOT NULL PRIMARY KEY
) WITHOUT ROWID;
