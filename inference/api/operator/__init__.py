"""The operator's API, /v1/admin/...: ordinary DRF over the ORM, behind keys with the scope `operator`."""
