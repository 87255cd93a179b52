-- Epochs of leases are drawn by lot: a sequence that a replica took over without the last commits gives numbers again, and
-- two leases with one epoch are no fence. 59 bits of a random UUID, and one that is always set; nobody orders epochs.
-- Lock and duration: ACCESS EXCLUSIVE on node_leases, milliseconds. Older code draws by lot as well: it takes the default.

ALTER TABLE postroad.node_leases ALTER COLUMN epoch SET DEFAULT
    ('x' || replace(left(gen_random_uuid()::text, 18), '-', ''))::bit(64)::bigint & 9223372036854775807;
DROP SEQUENCE postroad.lease_epoch;
