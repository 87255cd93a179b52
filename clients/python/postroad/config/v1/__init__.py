"""Generated from proto/postroad/config/v1 by `make proto`; do not edit."""
