-- The audit log also says who asked for a token that enrols a node, who withdrew a message, who took a refused spool
-- back: calls that change no table which the log watched.
-- Lock and duration: SHARE ROW EXCLUSIVE on three small tables, milliseconds. Older code does not notice.

CREATE OR REPLACE FUNCTION postroad.without_secrets(value jsonb) RETURNS jsonb
    LANGUAGE sql IMMUTABLE PARALLEL SAFE
    RETURN value
        - '{secret_sha256,scram_salt,scram_stored_key,scram_server_key,password_sealed,key_sealed,token_sha256}'::text[];

CREATE TRIGGER audit AFTER INSERT ON postroad.enrollment_tokens
    FOR EACH ROW EXECUTE FUNCTION postroad.audit();
CREATE TRIGGER audit AFTER INSERT ON postroad.commands
    FOR EACH ROW EXECUTE FUNCTION postroad.audit();
-- What nodes report moves these rows all the time; only operators turn `accepted` back on.
CREATE TRIGGER audit AFTER UPDATE OF accepted ON postroad.spools
    FOR EACH ROW WHEN (NEW.accepted AND NOT OLD.accepted) EXECUTE FUNCTION postroad.audit();
