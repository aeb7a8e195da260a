//! LoRA adapters in PEFT's format: `adapter_config.json` and `adapter_model.safetensors`.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::path::{Path, PathBuf};

use burn::module::Param;
use burn::tensor::{DType, Tensor, TensorData};
use serde_json::{Map, Value, json};
use terrarium_kernels::KernelBackend;
use terrarium_models::{Decoder, DecoderConfig, LoraConfig, LoraReport, LoraTargets};

use crate::atomic::{StagedDir, write_atomic};
use crate::error::AdapterError;
use crate::tensors::{cast, read_safetensors, write_safetensors};
use crate::{Error, Result};

const CONFIG: &str = "adapter_config.json";
const WEIGHTS: &str = "adapter_model.safetensors";
const PREFIX: &str = "base_model.model.";

/// The part of adapter_config.json that is used.
#[derive(Debug, Clone, PartialEq)]
pub struct AdapterConfig {
    /// Rank of each adapter.
    pub rank: usize,
    /// The adapter's share is `alpha / rank`.
    pub alpha: f32,
    /// Names (or ends of names) of the adapted modules.
    pub target_modules: Vec<String>,
    /// What the adapter was trained on.
    pub base_model: Option<String>,
}

impl AdapterConfig {
    /// Reads a directory's adapter_config.json; `None` where there is none.
    pub fn open(dir: &Path) -> Result<Option<Self>> {
        let file = dir.join(CONFIG);
        if !file.is_file() {
            return Ok(None);
        }
        let text = std::fs::read_to_string(&file).map_err(Error::io("read", &file))?;
        let map: Map<String, Value> = serde_json::from_str(&text).map_err(|source| Error::Json { file: file.clone(), source })?;
        Self::from_map(&map).map(Some).map_err(|problem| AdapterError::Unsupported { file, problem }.into())
    }

    fn from_map(map: &Map<String, Value>) -> Result<Self, String> {
        let kind = map.get("peft_type").and_then(Value::as_str).unwrap_or("LORA");
        if kind != "LORA" {
            return Err(format!("peft_type is {kind}; only LORA adapters are read"));
        }
        for key in ["use_dora", "fan_in_fan_out", "lora_bias", "use_qalora"] {
            if map.get(key).and_then(Value::as_bool) == Some(true) {
                return Err(format!("{key} is not supported"));
            }
        }
        if let Some(bias) = map.get("bias").and_then(Value::as_str).filter(|b| *b != "none") {
            return Err(format!("bias is `{bias}`; adapted biases are not supported"));
        }
        for key in ["modules_to_save", "rank_pattern", "alpha_pattern"] {
            let empty = match map.get(key) {
                None | Some(Value::Null) => true,
                Some(Value::Array(a)) => a.is_empty(),
                Some(Value::Object(o)) => o.is_empty(),
                Some(_) => false,
            };
            if !empty {
                return Err(format!("{key} is not supported"));
            }
        }
        let rank = map
            .get("r")
            .and_then(Value::as_u64)
            .and_then(|r| usize::try_from(r).ok())
            .filter(|&r| r > 0)
            .ok_or("r is missing or not positive")?;
        let mut alpha = map.get("lora_alpha").and_then(Value::as_f64).unwrap_or(rank as f64) as f32;
        if map.get("use_rslora").and_then(Value::as_bool) == Some(true) {
            // alpha / sqrt(rank) there, alpha / rank here.
            alpha *= (rank as f32).sqrt();
        }
        let target_modules = match map.get("target_modules") {
            Some(Value::Array(names)) => names.iter().filter_map(|n| n.as_str().map(String::from)).collect(),
            Some(Value::String(name)) => vec![name.clone()],
            _ => vec![],
        };
        let base_model = map.get("base_model_name_or_path").and_then(Value::as_str).filter(|b| !b.is_empty()).map(String::from);
        Ok(Self { rank, alpha, target_modules, base_model })
    }
}

/// Module path -> PEFT's name of the module, for every weight that can be adapted.
fn module_keys(config: &DecoderConfig) -> HashMap<String, String> {
    let strip = |s: &str| s.strip_suffix(".weight").map(String::from);
    config.table().entries.iter().filter_map(|e| Some((strip(&e.path)?, strip(&e.key)?))).collect()
}

fn leaf(path: &str) -> &str {
    path.rsplit('.').next().unwrap_or(path)
}

/// Saves a model's adapters alone, in the format that PEFT opens over `base_model`.
pub fn save_adapter<B: KernelBackend>(
    dir: &Path,
    model: &Decoder<B>,
    config: &DecoderConfig,
    lora: &LoraConfig,
    base_model: &str,
) -> Result<()> {
    let keys = module_keys(config);
    let mut tensors = Vec::new();
    let (mut adapted, mut plain) = (BTreeSet::new(), BTreeSet::new());
    model.clone().for_each_linear(&mut |path, linear| {
        let Some(key) = keys.get(path) else { return };
        let Some(adapter) = &linear.lora else {
            plain.insert(key.clone());
            return;
        };
        for (name, value) in [("lora_A", &adapter.a), ("lora_B", &adapter.b)] {
            tensors.push((format!("{PREFIX}{key}.{name}.weight"), value.val().into_data()));
        }
        adapted.insert(key.clone());
    });
    if adapted.is_empty() {
        return Err(AdapterError::Model("the model has no adapters to save".into()).into());
    }
    let staged = StagedDir::new(dir)?;
    let metadata = BTreeMap::from([("format".to_string(), "pt".to_string())]);
    write_safetensors(&staged.path().join(WEIGHTS), tensors, &metadata)?;
    let text = adapter_json(lora, &targets(&adapted, &plain), base_model);
    write_atomic(&staged.path().join(CONFIG), format!("{text:#}\n").as_bytes())?;
    staged.commit()
}

/// Last names where they say it all; whole names of modules whose namesakes are not adapted.
fn targets(adapted: &BTreeSet<String>, plain: &BTreeSet<String>) -> Vec<String> {
    let ambiguous: BTreeSet<&str> = plain.iter().map(|key| leaf(key)).collect();
    let names = adapted.iter().map(|key| if ambiguous.contains(leaf(key)) { key.as_str() } else { leaf(key) });
    names.collect::<BTreeSet<_>>().into_iter().map(String::from).collect()
}

fn adapter_json(lora: &LoraConfig, targets: &[String], base_model: &str) -> Value {
    json!({
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": 0.0,
        "target_modules": targets,
        "bias": "none",
        "fan_in_fan_out": false,
        "init_lora_weights": true,
        "inference_mode": true,
        "modules_to_save": null,
        "use_dora": false,
        "use_rslora": false,
    })
}

/// The two matrices of each adapted module, by PEFT's name of it.
fn read_pairs(dir: &Path) -> Result<BTreeMap<String, [Option<TensorData>; 2]>> {
    let file: PathBuf = dir.join(WEIGHTS);
    let (tensors, _) = read_safetensors(&file)?;
    let mut pairs: BTreeMap<String, [Option<TensorData>; 2]> = BTreeMap::new();
    let mut problems = Vec::new();
    for (key, data) in tensors {
        let name = key.strip_prefix(PREFIX).unwrap_or(&key);
        // PEFT writes `.lora_A.weight`; in memory and in some files the adapter's name stands between.
        let found = [".lora_A.", ".lora_B."].iter().enumerate().find_map(|(i, part)| {
            let (module, rest) = name.split_once(part)?;
            matches!(rest, "weight" | "default.weight").then(|| (i, module.to_string()))
        });
        match found {
            Some((i, module)) => pairs.entry(module).or_default()[i] = Some(data),
            None => problems.push(format!("{key}: not a lora_A or lora_B of a projection")),
        }
    }
    if problems.is_empty() { Ok(pairs) } else { Err(AdapterError::Mismatch { dir: dir.to_path_buf(), problems }.into()) }
}

/// Attaches a PEFT adapter to its base model. Everything that does not fit is one error.
pub fn load_adapter<B: KernelBackend>(
    dir: &Path,
    model: Decoder<B>,
    config: &DecoderConfig,
    device: &B::Device,
) -> Result<(Decoder<B>, LoraReport, AdapterConfig)> {
    let adapter = AdapterConfig::open(dir)?
        .ok_or_else(|| AdapterError::Unsupported { file: dir.join(CONFIG), problem: "there is no such file: not an adapter".into() })?;
    let mut pairs = read_pairs(dir)?;
    let path_of: HashMap<String, String> = module_keys(config).into_iter().map(|(path, key)| (key, path)).collect();
    let names: BTreeSet<String> = pairs.keys().filter_map(|key| path_of.get(key)).map(|path| leaf(path).to_string()).collect();
    if names.is_empty() {
        let problems = pairs.keys().map(|key| format!("{key}: the model has no such projection")).collect();
        return Err(AdapterError::Mismatch { dir: dir.to_path_buf(), problems }.into());
    }
    let lora = LoraConfig { rank: adapter.rank, alpha: adapter.alpha, targets: LoraTargets::Names(names.into_iter().collect()) };
    let (mut model, mut report) = model.attach_lora(&lora, 0, device).map_err(AdapterError::from)?;

    let keys = module_keys(config);
    let mut problems = Vec::new();
    model.for_each_linear(&mut |path, linear| {
        let pair = keys.get(path).and_then(|key| pairs.remove(key));
        let Some(adapter) = &mut linear.lora else { return };
        match pair {
            Some([Some(a), Some(b)]) => {
                for (slot, data, name) in [(&mut adapter.a, a, "lora_A"), (&mut adapter.b, b, "lora_B")] {
                    if data.shape.to_vec() == slot.val().dims() {
                        *slot = Param::from_tensor(Tensor::from_data(cast(data, DType::F32), (device, DType::F32)));
                    } else {
                        problems.push(format!("{path}.{name}: expected {:?}, found {:?}", slot.val().dims(), data.shape.to_vec()));
                    }
                }
            }
            Some(_) => problems.push(format!("{path}: one of lora_A and lora_B is missing")),
            // A namesake in another layer is adapted and this one is not.
            None => {
                let [rank, inputs] = adapter.a.dims();
                let dropped = rank * inputs + adapter.b.dims().iter().product::<usize>();
                report.trainable -= dropped;
                report.total -= dropped;
                report.adapted.retain(|p| p != path);
                report.untouched.push(path.to_string());
                linear.lora = None;
            }
        }
    });
    problems.extend(pairs.keys().map(|key| format!("{key}: the model has no such projection")));
    if problems.is_empty() { Ok((model, report, adapter)) } else { Err(AdapterError::Mismatch { dir: dir.to_path_buf(), problems }.into()) }
}
