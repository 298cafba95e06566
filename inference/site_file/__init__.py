"""The configuration of a site as a file: read strictly, compared, applied whole or not at all."""
