ALTER TABLE postroad.node_pools
    DROP COLUMN max_connections,
    DROP COLUMN max_connections_per_address,
    DROP COLUMN log_level;
