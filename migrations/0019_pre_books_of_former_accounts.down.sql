REVOKE SELECT (messages_since) ON postroad.accounts FROM postroad_fleet;
