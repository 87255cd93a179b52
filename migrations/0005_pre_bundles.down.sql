DROP TABLE postroad.denial_state;
DROP TABLE postroad.denials;
DROP TABLE postroad.config_revisions;
DROP TABLE postroad.config_bundles;
