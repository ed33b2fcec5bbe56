"""A web page to try a model on images: chat, short answers, true or false, boxes."""
