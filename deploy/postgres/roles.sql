-- The two roles that Tollbook uses. Run it as a superuser; it may be run again. Then give both
-- roles a password and LOGIN, and create the database: CREATE DATABASE tollbook OWNER tollbook_owner.
-- The embedded server runs this same file.
--
-- tollbook_owner owns the database and its tables and runs the migrations. tollbook_app runs
-- everything else and owns nothing, so it can neither drop a trigger nor alter a table: what it
-- may do is granted to it at the end of each migration (billing/privileges.py).

DO $$
BEGIN
    IF NOT EXISTS (SELECT FROM pg_roles WHERE rolname = 'tollbook_owner') THEN
        CREATE ROLE tollbook_owner NOSUPERUSER NOCREATEROLE;
    END IF;
    IF NOT EXISTS (SELECT FROM pg_roles WHERE rolname = 'tollbook_app') THEN
        CREATE ROLE tollbook_app NOSUPERUSER NOCREATEDB NOCREATEROLE;
    END IF;
END
$$;
