-- Works with schema 3: who does not know this column does not miss it.

-- Old and new versions of Kamado on one database, while instances are replaced one after the other: the oldest schema
-- that a process may know and still use a database with this step. NULL is the step itself.
ALTER TABLE schema_version ADD COLUMN works_with INTEGER;
