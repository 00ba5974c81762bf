"""Parts that several scripts share: a server of their own, scripts in processes of their own, options and tables."""
