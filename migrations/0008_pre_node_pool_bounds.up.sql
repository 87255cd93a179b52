-- A pool says how many connections its nodes hold and what they log, over what stands in each node's own settings.
-- Lock and duration: ACCESS EXCLUSIVE on a small table, milliseconds. Older code names its columns and does not notice.

ALTER TABLE postroad.node_pools
    ADD COLUMN max_connections integer,
    ADD COLUMN max_connections_per_address integer,
    ADD COLUMN log_level text,
    ADD CONSTRAINT ck_node_pools_max_connections CHECK (max_connections BETWEEN 1 AND 1000000),
    ADD CONSTRAINT ck_node_pools_max_connections_per_address CHECK (max_connections_per_address BETWEEN 1 AND 1000000),
    ADD CONSTRAINT ck_node_pools_log_level CHECK (log_level IN ('debug', 'info', 'warning', 'error'));
COMMENT ON COLUMN postroad.node_pools.max_connections IS 'NULL, as of its two neighbours: the settings of each node';
