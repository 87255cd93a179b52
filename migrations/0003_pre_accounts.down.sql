DROP TABLE postroad.idempotency;
DROP TABLE postroad.smtp_credentials;
DROP TABLE postroad.api_keys;
DROP TABLE postroad.account_networks;
DROP TABLE postroad.account_sender_domains;
DROP TABLE postroad.former_accounts;
DROP TABLE postroad.accounts;
