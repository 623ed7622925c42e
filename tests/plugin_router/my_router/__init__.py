"""A user's package: a router that Turnout finds by `kind: my_router.threshold:ThresholdRouterConfig`."""
