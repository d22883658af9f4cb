"""The report page: markup, style and script, put into one file when a report is written."""
