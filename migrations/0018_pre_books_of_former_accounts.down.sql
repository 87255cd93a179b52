DROP POLICY pl_accounts_fleet ON postroad.accounts;
REVOKE SELECT (account, messages_since) ON postroad.accounts FROM postroad_fleet;
