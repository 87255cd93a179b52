DROP TABLE postroad.spools;
DROP TABLE postroad.enrollment_tokens;
DROP TABLE postroad.node_status;
DROP TABLE postroad.nodes;
DROP TABLE postroad.pool_keys;
DROP TABLE postroad.node_pools;
