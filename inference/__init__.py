"""The request's clock: admit, queue, stream, settle. The step's clock is in inference/engine."""
