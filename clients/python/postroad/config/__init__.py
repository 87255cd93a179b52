"""Generated from proto/postroad/config by `make proto`; do not edit."""
