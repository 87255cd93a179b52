"""HTTP: health, metrics, and the JSON form of the API."""
