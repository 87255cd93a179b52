"""One use case each; a service owns its transaction."""
