DROP TRIGGER audit ON postroad.spools;
DROP TRIGGER audit ON postroad.commands;
DROP TRIGGER audit ON postroad.enrollment_tokens;

CREATE OR REPLACE FUNCTION postroad.without_secrets(value jsonb) RETURNS jsonb
    LANGUAGE sql IMMUTABLE PARALLEL SAFE
    RETURN value
        - '{secret_sha256,scram_salt,scram_stored_key,scram_server_key,password_sealed,key_sealed}'::text[];
