"""The main job: fusedrnn beside torch.nn on IMDB reviews and on sine and price series."""
