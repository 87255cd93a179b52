DROP POLICY pl_nodes_account ON postroad.nodes;
DROP TRIGGER refuse_given_up ON postroad.spools;
DROP FUNCTION postroad.refuse_given_up_spool();
DROP TABLE postroad.given_up_spools;
