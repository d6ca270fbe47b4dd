"""Reading and writing: own files, diffusers folders, EDM files, the hub, pipelines, the shipped networks."""
