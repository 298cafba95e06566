"""The native dialect: /v1/generate, /v1/models, /v1/me, /v1/requests; flat errors."""
