-- What searches go by (management 7).

-- Each string, number and boolean of a device's document, under its JSON pointer without array indexes. A value that
-- is too long for a key stands there with its beginning and a digest, and whole beside it.
CREATE TABLE device_members (
    tenant_id TEXT NOT NULL,
    member TEXT NOT NULL,
    value TEXT NOT NULL,
    device_id TEXT NOT NULL,
    long_text TEXT,
    PRIMARY KEY (tenant_id, member, value, device_id)
) WITHOUT ROWID;

-- The same of tenants.
CREATE TABLE tenant_members (
    member TEXT NOT NULL,
    value TEXT NOT NULL,
    tenant_id TEXT NOT NULL,
    long_text TEXT,
    PRIMARY KEY (member, value, tenant_id)
) WITHOUT ROWID;

-- To count tenants and to skip some without reading their documents.
CREATE INDEX tenants_by_id ON tenants (tenant_id);

-- How many devices there are from an id on to the first of the next range: so that the page at any offset is found
-- without passing all that come before it. The first range of a tenant begins with the empty id.
CREATE TABLE device_ranges (
    tenant_id TEXT NOT NULL,
    first_id TEXT NOT NULL,
    devices BIGINT NOT NULL,
    PRIMARY KEY (tenant_id, first_id)
) WITHOUT ROWID;
