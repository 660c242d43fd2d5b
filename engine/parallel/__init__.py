"""The group of ranks that share one target model."""
