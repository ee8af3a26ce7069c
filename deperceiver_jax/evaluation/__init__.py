"""Evaluation: predictions -> detections -> COCO's statistics."""
