-- What searches go by (management 7).

-- Each string, number and boolean of a device's document, under its JSON pointer without array indexes. A value that
-- is too long for a key stands there with its beginning and a digest, and whole beside it.
CREATE TABLE device_members (
    tenant_id TEXT COLLATE "C" NOT NULL,
    member TEXT COLLATE "C" NOT NULL,
    value TEXT COLLATE "C" NOT NULL,
    device_id TEXT COLLATE "C" NOT NULL,
    long_text TEXT COLLATE "C",
    PRIMARY KEY (tenant_id, member, value, device_id)
);

-- The same of tenants.
CREATE TABLE tenant_members (
    member TEXT COLLATE "C" NOT NULL,
    value TEXT COLLATE "C" NOT NULL,
    tenant_id TEXT COLLATE "C" NOT NULL,
    long_text TEXT COLLATE "C",
    PRIMARY KEY (member, value, tenant_id)
);

-- How many devices there are from an id on to the first of the next range: so that the page at any offset is found
-- without passing all that come before it. The first range of a tenant begins with the empty id.
CREATE TABLE device_ranges (
    tenant_id TEXT COLLATE "C" NOT NULL,
    first_id TEXT COLLATE "C" NOT NULL,
    devices BIGINT NOT NULL,
    PRIMARY KEY (tenant_id, first_id)
) WITH (fillfactor = 40);
