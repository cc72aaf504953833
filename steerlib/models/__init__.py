"""A name in, a bridge out: `loading` (packaged name, hub name or folder -> `TransformerBridge`) and
`packaged` (a model inside wheels -> a folder). Stands beside the core and imports none of it but
its file helpers; torch and transformers are imported when a model is loaded."""
