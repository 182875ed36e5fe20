"""Tiny configurations of many classes of transformers, and why some are refused. Data alone."""

TEXT = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "vocab_size": 50,
}
VISION = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "image_size": 32,
    "patch_size": 8,
}
AUDIO = TEXT | {
    "conv_dim": (8, 8),
    "conv_stride": (5, 4),
    "conv_kernel": (10, 8),
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 2,
}
LAYERS = {
    "d_model": 16,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
}
SPECIAL = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
GPT = {"n_embd": 16, "n_layer": 1, "n_head": 2, "vocab_size": 50, "n_positions": 64, **SPECIAL}
T5 = {
    "d_model": 16,
    "d_kv": 8,
    "d_ff": 32,
    "num_layers": 1,
    "num_heads": 2,
    "vocab_size": 50,
    "decoder_start_token_id": 0,
}
RESNET = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"}
FOUR = {"hidden_sizes": [8, 8, 8, 8], "depths": [1, 1, 1, 1]}
DETR = LAYERS | {
    "use_timm_backbone": False,
    "use_pretrained_backbone": False,
    "backbone": None,
    "backbone_config": RESNET | {"model_type": "resnet", "out_features": ["stage2"]},
    "num_queries": 4,
}

# class → (configuration, settings, names of the inputs that are given)
EXPORTED = {
    "BertForSequenceClassification": ("BertConfig", TEXT | {"num_labels": 3}, "input_ids"),
    "DistilBertForTokenClassification": (
        "DistilBertConfig",
        {"dim": 16, "n_layers": 1, "n_heads": 2, "hidden_dim": 32, "vocab_size": 50},
        "input_ids",
    ),
    "RobertaForQuestionAnswering": (
        "RobertaConfig",
        TEXT | {"max_position_embeddings": 66, "pad_token_id": 1},
        "input_ids",
    ),
    "BertForMaskedLM": ("BertConfig", TEXT, "input_ids"),
    "BertForMultipleChoice": ("BertConfig", TEXT, "input_ids"),
    "BertForNextSentencePrediction": ("BertConfig", TEXT, "input_ids"),
    "ElectraForPreTraining": ("ElectraConfig", TEXT | {"embedding_size": 16}, "input_ids"),
    "MPNetModel": ("MPNetConfig", TEXT, "input_ids"),
    "DebertaV2ForSequenceClassification": ("DebertaV2Config", TEXT, "input_ids"),
    "ModernBertForMaskedLM": ("ModernBertConfig", TEXT | SPECIAL | {"cls_token_id": 1, "sep_token_id": 2}, "input_ids"),
    "LayoutLMForTokenClassification": ("LayoutLMConfig", TEXT | {"max_2d_position_embeddings": 64}, "input_ids"),
    "GPT2LMHeadModel": ("GPT2Config", GPT, "input_ids"),
    "GPT2ForSequenceClassification": ("GPT2Config", GPT, "input_ids"),
    "LlamaForCausalLM": ("LlamaConfig", TEXT | {"num_key_value_heads": 1}, "input_ids"),
    "Qwen3ForCausalLM": ("Qwen3Config", TEXT | {"num_key_value_heads": 1, "head_dim": 8}, "input_ids"),
    "T5EncoderModel": ("T5Config", T5, "input_ids"),
    "T5ForConditionalGeneration": ("T5Config", T5, "input_ids decoder_input_ids"),
    "BartForConditionalGeneration": (
        "BartConfig",
        LAYERS | SPECIAL | {"vocab_size": 50, "max_position_embeddings": 64, "decoder_start_token_id": 2},
        "input_ids decoder_input_ids",
    ),
    "ViTForImageClassification": ("ViTConfig", VISION, "pixel_values"),
    "ResNetForImageClassification": ("ResNetConfig", RESNET, "pixel_values"),
    "ConvNextForImageClassification": ("ConvNextConfig", FOUR | {"image_size": 32}, "pixel_values"),
    "SwinForImageClassification": (
        "SwinConfig",
        {"embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2], "window_size": 4, "image_size": 32, "patch_size": 4},
        "pixel_values",
    ),
    "MobileNetV2ForSemanticSegmentation": (
        "MobileNetV2Config",
        {"depth_multiplier": 0.35, "image_size": 64, "num_labels": 4},
        "pixel_values",
    ),
    "SegformerForSemanticSegmentation": (
        "SegformerConfig",
        FOUR | {"decoder_hidden_size": 8, "image_size": 64, "num_attention_heads": [1, 1, 1, 1]},
        "pixel_values",
    ),
    "YolosForObjectDetection": (
        "YolosConfig",
        VISION | {"image_size": [32, 32], "num_detection_tokens": 4},
        "pixel_values",
    ),
    "DetrForObjectDetection": ("DetrConfig", DETR, "pixel_values"),
    "DPTForDepthEstimation": (
        "DPTConfig",
        VISION
        | {
            "num_hidden_layers": 4,
            "backbone_out_indices": [0, 1, 2, 3],
            "neck_hidden_sizes": [8, 8, 8, 8],
            "fusion_hidden_size": 8,
            "is_hybrid": False,
        },
        "pixel_values",
    ),
    "Dinov2Model": ("Dinov2Config", VISION, "pixel_values"),
    "Swin2SRForImageSuperResolution": (
        "Swin2SRConfig",
        {"embed_dim": 8, "depths": [1], "num_heads": [2], "window_size": 4, "image_size": 16},
        "pixel_values",
    ),
    "VideoMAEForVideoClassification": (
        "VideoMAEConfig",
        VISION | {"num_frames": 4, "tubelet_size": 2, "decoder_hidden_size": 16, "decoder_intermediate_size": 32},
        "pixel_values",
    ),
    "TimesformerForVideoClassification": ("TimesformerConfig", VISION | {"num_frames": 2}, "pixel_values"),
    "Wav2Vec2ForCTC": ("Wav2Vec2Config", AUDIO, "input_values"),
    "HubertForSequenceClassification": ("HubertConfig", AUDIO | {"classifier_proj_size": 8}, "input_values"),
    "Wav2Vec2ForAudioFrameClassification": ("Wav2Vec2Config", AUDIO, "input_values"),
    "Wav2Vec2ForXVector": (
        "Wav2Vec2Config",
        AUDIO | {"tdnn_dim": (8, 8), "tdnn_kernel": (3, 1), "tdnn_dilation": (1, 1), "xvector_output_dim": 8},
        "input_values",
    ),
    "ASTForAudioClassification": (
        "ASTConfig",
        {
            "hidden_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "intermediate_size": 32,
            "max_length": 64,
            "num_mel_bins": 32,
            "frequency_stride": 8,
            "time_stride": 8,
        },
        "input_values",
    ),
    "WhisperForConditionalGeneration": (
        "WhisperConfig",
        LAYERS
        | SPECIAL
        | {
            "vocab_size": 50,
            "num_mel_bins": 8,
            "max_source_positions": 20,
            "max_target_positions": 16,
            "decoder_start_token_id": 1,
        },
        "input_features decoder_input_ids",
    ),
    "CLIPModel": (
        "CLIPConfig",
        {
            "text_config": TEXT | SPECIAL | {"max_position_embeddings": 16},
            "vision_config": VISION,
            "projection_dim": 8,
        },
        "input_ids pixel_values",
    ),
    "PatchTSTForPrediction": (
        "PatchTSTConfig",
        {
            "num_input_channels": 2,
            "context_length": 32,
            "prediction_length": 4,
            "patch_length": 8,
            "patch_stride": 8,
            "d_model": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "ffn_dim": 32,
        },
        "past_values",
    ),
}

# Of every kind of input one: the others take part in the slow tests.
QUICK = (
    "BertForMultipleChoice",
    "LlamaForCausalLM",
    "T5ForConditionalGeneration",
    "ViTForImageClassification",
    "Wav2Vec2ForCTC",
    "CLIPModel",
)

# class → (configuration, settings, code of the error, why)
REFUSED = {
    "ViTMAEForPreTraining": (
        "ViTMAEConfig",
        VISION
        | {
            "decoder_hidden_size": 16,
            "decoder_num_hidden_layers": 1,
            "decoder_num_attention_heads": 2,
            "decoder_intermediate_size": 32,
        },
        "unrepeatable",
        "it masks random patches in every call, also in eval mode",
    ),
    "RTDetrForObjectDetection": (
        "RTDetrConfig",
        {
            "backbone_config": {
                "model_type": "rt_detr_resnet",
                "embedding_size": 8,
                "hidden_sizes": [8, 16, 16, 16],
                "depths": [1, 1, 1, 1],
                "layer_type": "basic",
                "out_features": ["stage2", "stage3", "stage4"],
            },
            "encoder_hidden_dim": 16,
            "encoder_in_channels": [16, 16, 16],
            "encoder_ffn_dim": 32,
            "encoder_attention_heads": 2,
            "d_model": 16,
            "decoder_in_channels": [16, 16, 16],
            "decoder_ffn_dim": 32,
            "decoder_layers": 1,
            "decoder_attention_heads": 2,
            "num_queries": 4,
            "num_denoising": 0,
            "anchor_image_size": None,
            "eval_size": None,
        },
        "fixed-size",
        "its batch becomes a number while it is exported; Task(dynamic={}) takes it",
    ),
}
