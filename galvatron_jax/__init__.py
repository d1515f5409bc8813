"""How should this model be spread over these GPUs? The whole public API, loaded lazily."""
