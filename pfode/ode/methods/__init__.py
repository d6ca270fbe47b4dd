"""The methods: one small file or one table of tableaus each."""
