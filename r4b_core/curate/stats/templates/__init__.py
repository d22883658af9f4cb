"""The page's HTML, style and script."""
