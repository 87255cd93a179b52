"""Generated from proto/postroad/node/v1 by `make proto`; do not edit."""
