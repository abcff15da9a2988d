"""Indexes open for searching by words, and the web page that searches them."""
