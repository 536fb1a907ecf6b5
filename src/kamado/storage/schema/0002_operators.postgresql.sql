-- Accounts of operators: logins of the management API over HTTP (management 3.11). While there is none, and only this
-- machine reaches the API, nobody has to log in.
CREATE TABLE operators (
    name TEXT COLLATE "C" NOT NULL PRIMARY KEY,
    password_hash TEXT COLLATE "C" NOT NULL,
    may_reveal_secrets SMALLINT NOT NULL,
    created BIGINT NOT NULL
);
