ALTER TABLE postroad.accounts DROP COLUMN delivery_weight;
DROP TABLE postroad.limit_policies;
