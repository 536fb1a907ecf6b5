-- Works with schema 3: a registry that was never copied has no use for this table.

-- Whether this database is being made a copy of another one (`kamado copy`): a row while it is not complete. It is
-- written in the transactions that copy, so it tells exactly what is here. "state" is a JSON object.
CREATE TABLE unfinished_copies (
    source TEXT NOT NULL PRIMARY KEY,
    state TEXT NOT NULL
) WITHOUT ROWID;
