"""Where images come from: one small reader for each form that people have them in, behind `ImageSource`."""
