//! Which files of a repository are its weights.

use super::ADAPTER;

const CONFIG: &str = "config.json";
/// The configuration in Mistral's own distribution of Codestral-Mamba.
const PARAMS: &str = "params.json";
pub(super) const LATEST: &str = "latest_checkpointed_iteration.txt";

/// One file, or an index of several, in the order in which an opened directory looks for them.
pub(super) const WEIGHTS: [(&str, bool); 5] = [
    ("model.safetensors", false),
    ("model.safetensors.index.json", true),
    ("pytorch_model.bin", false),
    ("pytorch_model.bin.index.json", true),
    ("consolidated.safetensors", false),
];

/// What a repository (or a folder of the cache) holds, by the names of its files.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// A configuration, the file of this name, and weights.
    Model(&'static str),
    /// A PEFT adapter.
    Adapter,
    /// The folders of a Megatron run.
    Megatron,
}

impl Kind {
    pub(super) fn of(has: impl Fn(&str) -> bool) -> Option<Self> {
        if has(CONFIG) {
            Some(Self::Model(CONFIG))
        } else if has(ADAPTER[0]) {
            Some(Self::Adapter)
        } else if has(LATEST) {
            Some(Self::Megatron)
        } else {
            has(PARAMS).then_some(Self::Model(PARAMS))
        }
    }

    /// What has to be there before anything else can be known.
    pub(super) fn first(self) -> &'static str {
        match self {
            Self::Model(config) => config,
            Self::Adapter => ADAPTER[0],
            Self::Megatron => LATEST,
        }
    }
}

/// The weights of a model: a file, or an index.
pub(super) fn of_model(has: impl Fn(&str) -> bool) -> Option<(&'static str, bool)> {
    WEIGHTS.into_iter().find(|(name, _)| has(name))
}

/// What to say where there are none.
pub(super) fn expected() -> String {
    let [others @ .., last] = WEIGHTS.map(|(name, _)| name);
    format!("{} or {last}", others.join(", "))
}

/// The files of all ranks of the iteration that the text of [`LATEST`] names.
pub(super) fn of_megatron<'a>(latest: &str, files: impl Iterator<Item = &'a str>) -> Vec<String> {
    let folder = match latest.trim() {
        "release" => "release".to_string(),
        number => format!("iter_{number:0>7}"),
    };
    let is_rank = |file: &&str| {
        let parts: Vec<&str> = file.split('/').collect();
        matches!(parts.as_slice(), [first, rank, name] if *first == folder && is_plain(rank, "mp_rank_") && *name == "model_optim_rng.pt")
    };
    files.filter(is_rank).map(str::to_string).collect()
}

/// A name that leads nowhere else on any system.
fn is_plain(name: &str, prefix: &str) -> bool {
    name.strip_prefix(prefix).is_some_and(|rest| rest.chars().all(|c| c.is_ascii_digit() || c == '_'))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_configuration_says_more_than_the_folders_beside_it() {
        let kind = |files: &[&str]| Kind::of(|file| files.contains(&file));
        assert_eq!(kind(&["config.json", "params.json", LATEST]), Some(Kind::Model(CONFIG)));
        assert_eq!(kind(&["params.json", "consolidated.safetensors"]), Some(Kind::Model(PARAMS)));
        assert_eq!(kind(&[LATEST]), Some(Kind::Megatron));
        assert_eq!(kind(&["README.md"]), None);
    }

    #[test]
    fn safetensors_come_before_pickles() {
        let weights = |files: &[&str]| of_model(|file| files.contains(&file)).map(|(name, _)| name);
        assert_eq!(weights(&["pytorch_model.bin", "model.safetensors.index.json"]), Some("model.safetensors.index.json"));
        assert_eq!(weights(&["pytorch_model.bin"]), Some("pytorch_model.bin"));
        assert_eq!(weights(&["consolidated.safetensors"]), Some("consolidated.safetensors"));
        assert_eq!(weights(&["model.gguf"]), None);
    }

    #[test]
    fn ranks_are_those_of_the_latest_iteration() {
        let files = ["iter_0000010/mp_rank_00/model_optim_rng.pt", "iter_0000012/mp_rank_00_001/model_optim_rng.pt", "release/x"];
        let found = |latest: &str| of_megatron(latest, files.into_iter());
        assert_eq!(found("12\n"), [files[1]]);
        assert_eq!(found("10"), [files[0]]);
        assert!(found("release").is_empty());
        let odd = ["release/mp_rank_00\\..\\x/model_optim_rng.pt", "release/mp_rank_../model_optim_rng.pt", "release/mp_rank_00/a.pt"];
        assert!(of_megatron("release", odd.into_iter()).is_empty());
    }
}
