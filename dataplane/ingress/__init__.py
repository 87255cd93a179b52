"""Where mail comes in: listeners, TLS, AUTH, SMTP sessions."""
