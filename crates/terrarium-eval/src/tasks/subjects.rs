//! The subjects of MMLU and the four fields the harness puts them into.

/// A field: name of its group, what it is called, its subjects.
pub(crate) struct Field {
    pub name: &'static str,
    pub alias: &'static str,
    pub subjects: &'static [&'static str],
}

/// In the order of the harness.
pub(crate) const FIELDS: [Field; 4] = [
    Field {
        name: "mmlu_stem",
        alias: "stem",
        subjects: &[
            "abstract_algebra",
            "anatomy",
            "astronomy",
            "college_biology",
            "college_chemistry",
            "college_computer_science",
            "college_mathematics",
            "college_physics",
            "computer_security",
            "conceptual_physics",
            "electrical_engineering",
            "elementary_mathematics",
            "high_school_biology",
            "high_school_chemistry",
            "high_school_computer_science",
            "high_school_mathematics",
            "high_school_physics",
            "high_school_statistics",
            "machine_learning",
        ],
    },
    Field {
        name: "mmlu_other",
        alias: "other",
        subjects: &[
            "business_ethics",
            "clinical_knowledge",
            "college_medicine",
            "global_facts",
            "human_aging",
            "management",
            "marketing",
            "medical_genetics",
            "miscellaneous",
            "nutrition",
            "professional_accounting",
            "professional_medicine",
            "virology",
        ],
    },
    Field {
        name: "mmlu_social_sciences",
        alias: "social sciences",
        subjects: &[
            "econometrics",
            "high_school_geography",
            "high_school_government_and_politics",
            "high_school_macroeconomics",
            "high_school_microeconomics",
            "high_school_psychology",
            "human_sexuality",
            "professional_psychology",
            "public_relations",
            "security_studies",
            "sociology",
            "us_foreign_policy",
        ],
    },
    Field {
        name: "mmlu_humanities",
        alias: "humanities",
        subjects: &[
            "formal_logic",
            "high_school_european_history",
            "high_school_us_history",
            "high_school_world_history",
            "international_law",
            "jurisprudence",
            "logical_fallacies",
            "moral_disputes",
            "moral_scenarios",
            "philosophy",
            "prehistory",
            "professional_law",
            "world_religions",
        ],
    },
];

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::FIELDS;

    #[test]
    fn every_subject_is_of_one_field() {
        let all: Vec<&str> = FIELDS.iter().flat_map(|field| field.subjects).copied().collect();
        assert_eq!((all.len(), all.iter().collect::<BTreeSet<_>>().len()), (57, 57));
    }
}
