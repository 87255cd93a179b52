ALTER TABLE postroad.spools DROP COLUMN opening, DROP COLUMN reported_opening;
