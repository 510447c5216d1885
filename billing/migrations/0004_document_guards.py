"""The database itself refuses to change what was promised or printed: prices, invoices, statements.

Drafts are free. A final document only moves along its status machine, and what was empty may be filled in once.
All triggers are ENABLE ALWAYS. See `billing/README.md` for the status machines.
"""

from django.db import migrations

FUNCTIONS = """
CREATE FUNCTION public.tollbook_guard_invoice() RETURNS trigger LANGUAGE plpgsql AS $$
DECLARE
    name text;
    lines_minor numeric;
    is_unchanged boolean;
BEGIN
    IF TG_OP = 'INSERT' THEN
        IF NEW.status <> 'DRAFT' THEN
            RAISE EXCEPTION USING
                ERRCODE = 'integrity_constraint_violation',
                CONSTRAINT = 'invoice_status_machine',
                MESSAGE = format('an invoice begins as DRAFT, not %s', NEW.status),
                HINT = 'Insert the draft and its lines, then finalize it.';
        END IF;
        RETURN NEW;
    END IF;
    name := format('invoice %s-%s', OLD.series_id, OLD.number);
    IF TG_OP = 'DELETE' THEN
        IF OLD.status <> 'DRAFT' THEN
            RAISE EXCEPTION USING
                ERRCODE = 'integrity_constraint_violation',
                CONSTRAINT = 'invoice_is_final',
                MESSAGE = format('%s is %s: DELETE refused', name, OLD.status),
                HINT = 'Void it, or issue a credit note.';
        END IF;
        RETURN OLD;
    END IF;
    IF NEW.status <> OLD.status AND NOT (
        (OLD.status = 'DRAFT' AND NEW.status = 'FINALIZED')
        OR (OLD.status = 'FINALIZED' AND NEW.status IN ('PAID', 'VOID', 'UNCOLLECTIBLE'))
    ) THEN
        RAISE EXCEPTION USING
            ERRCODE = 'integrity_constraint_violation',
            CONSTRAINT = 'invoice_status_machine',
            MESSAGE = format('an invoice does not go from %s to %s', OLD.status, NEW.status),
            HINT = 'DRAFT to FINALIZED; FINALIZED to PAID, VOID or UNCOLLECTIBLE.';
    END IF;
    IF OLD.status <> 'DRAFT' THEN
        is_unchanged := to_jsonb(NEW) - '{status,canonical_sha256,journal_entry_id}'::text[]
              = to_jsonb(OLD) - '{status,canonical_sha256,journal_entry_id}'::text[]
            AND (OLD.canonical_sha256 = '' OR NEW.canonical_sha256 = OLD.canonical_sha256)
            AND (OLD.journal_entry_id IS NULL OR NEW.journal_entry_id IS NOT DISTINCT FROM OLD.journal_entry_id);
        IF NOT is_unchanged THEN
            RAISE EXCEPTION USING
                ERRCODE = 'integrity_constraint_violation',
                CONSTRAINT = 'invoice_is_final',
                MESSAGE = format('%s is %s: only its status may change', name, OLD.status),
                HINT = 'Correct it by a credit note, or void it and issue another.';
        END IF;
    ELSIF NEW.status = 'FINALIZED' THEN
        SELECT coalesce(sum(line.amount_minor), 0::numeric) INTO lines_minor
        FROM public.billing_invoiceline AS line WHERE line.invoice_id = NEW.id;
        IF lines_minor <> NEW.subtotal_minor::numeric THEN
            RAISE EXCEPTION USING
                ERRCODE = 'integrity_constraint_violation',
                CONSTRAINT = 'invoice_subtotal_is_sum_of_lines',
                MESSAGE = format('the lines of the invoice sum to %s, its subtotal is %s', lines_minor, NEW.subtotal_minor);
        END IF;
    END IF;
    RETURN NEW;
END $$;

CREATE FUNCTION public.tollbook_guard_invoice_line() RETURNS trigger LANGUAGE plpgsql AS $$
DECLARE
    invoice record;
BEGIN
    FOR invoice IN
        SELECT candidate.id, candidate.status FROM public.billing_invoice AS candidate
        WHERE (TG_OP <> 'INSERT' AND candidate.id = OLD.invoice_id)
           OR (TG_OP <> 'DELETE' AND candidate.id = NEW.invoice_id)
        FOR SHARE  -- finalizing waits for lines that are being written, and the other way round
    LOOP
        IF invoice.status <> 'DRAFT' THEN
            RAISE EXCEPTION USING
                ERRCODE = 'integrity_constraint_violation',
                CONSTRAINT = 'invoice_is_final',
                MESSAGE = format('invoice %s is %s: %s of a line refused', invoice.id, invoice.status, TG_OP),
                HINT = 'Write the lines while the invoice is a draft.';
        END IF;
    END LOOP;
    IF TG_OP = 'DELETE' THEN
        RETURN OLD;
    END IF;
    RETURN NEW;
END $$;

CREATE FUNCTION public.tollbook_guard_statement() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF OLD.is_final AND NOT (
        TG_OP = 'UPDATE'
        AND to_jsonb(NEW) - 'canonical_sha256'::text = to_jsonb(OLD) - 'canonical_sha256'::text
        AND (OLD.canonical_sha256 = '' OR NEW.canonical_sha256 = OLD.canonical_sha256)
    ) THEN
        RAISE EXCEPTION USING
            ERRCODE = 'integrity_constraint_violation',
            CONSTRAINT = 'statement_is_final',
            MESSAGE = format('statement %s is final: %s refused', OLD.id, TG_OP),
            HINT = 'A correction goes on the next statement.';
    END IF;
    IF TG_OP = 'DELETE' THEN
        RETURN OLD;
    END IF;
    RETURN NEW;
END $$;

CREATE FUNCTION public.tollbook_guard_statement_line() RETURNS trigger LANGUAGE plpgsql AS $$
DECLARE
    statement record;
BEGIN
    FOR statement IN
        SELECT candidate.id, candidate.is_final FROM public.billing_statement AS candidate
        WHERE (TG_OP <> 'INSERT' AND candidate.id = OLD.statement_id)
           OR (TG_OP <> 'DELETE' AND candidate.id = NEW.statement_id)
        FOR SHARE
    LOOP
        IF statement.is_final THEN
            RAISE EXCEPTION USING
                ERRCODE = 'integrity_constraint_violation',
                CONSTRAINT = 'statement_is_final',
                MESSAGE = format('statement %s is final: %s of a line refused', statement.id, TG_OP),
                HINT = 'Write the lines first, then set is_final.';
        END IF;
    END LOOP;
    IF TG_OP = 'DELETE' THEN
        RETURN OLD;
    END IF;
    RETURN NEW;
END $$;

CREATE FUNCTION public.tollbook_is_rate_card_used(card_id bigint) RETURNS boolean LANGUAGE sql STABLE AS $$
    -- Accruals are dated on or after the days of their usage, so later ones may rest on the card.
    SELECT EXISTS (
        SELECT FROM public.billing_ratecard AS card
        JOIN public.billing_pricebook AS book ON book.id = card.price_book_id
        JOIN public.billing_posting AS posting
          ON posting.served_model_id = card.served_model_id
         AND posting.account_id = CASE book.side WHEN 'TENANT' THEN '4000' ELSE '5000' END
        JOIN public.billing_journalentry AS entry
          ON entry.id = posting.journal_entry_id AND entry.effective_on >= card.effective_from
        WHERE card.id = card_id
          AND (EXISTS (SELECT FROM public.billing_contract AS contract
                       WHERE contract.price_book_id = book.id AND contract.tenant_id = posting.tenant_id)
               OR EXISTS (SELECT FROM public.billing_upstream AS upstream
                          JOIN public.billing_provider AS provider ON provider.id = upstream.provider_id
                          WHERE upstream.price_book_id = book.id AND provider.party_id = posting.party_id))
    )
$$;

CREATE FUNCTION public.tollbook_guard_dated_version() RETURNS trigger LANGUAGE plpgsql AS $$
DECLARE
    is_used boolean;
    first_changed_on date;
BEGIN
    IF TG_TABLE_NAME = 'billing_ratecard' THEN
        is_used := public.tollbook_is_rate_card_used(OLD.id);
    ELSIF TG_TABLE_NAME = 'billing_agreementversion' THEN
        SELECT EXISTS (
            SELECT FROM public.billing_posting AS posting
            JOIN public.billing_journalentry AS entry ON entry.id = posting.journal_entry_id
            WHERE posting.agreement_id = OLD.agreement_id AND entry.effective_on >= OLD.effective_from
        ) INTO is_used;
    ELSE
        SELECT EXISTS (
            SELECT FROM public.billing_posting AS posting
            JOIN public.billing_journalentry AS entry ON entry.id = posting.journal_entry_id
            WHERE posting.tenant_id = OLD.tenant_id AND posting.account_id = '4000'
              AND entry.effective_on >= OLD.effective_from
        ) INTO is_used;
    END IF;
    IF NOT is_used THEN
        IF TG_OP = 'DELETE' THEN
            RETURN OLD;
        END IF;
        RETURN NEW;
    END IF;
    IF TG_OP = 'UPDATE' AND to_jsonb(NEW) - 'effective_to'::text = to_jsonb(OLD) - 'effective_to'::text THEN
        first_changed_on := least(coalesce(OLD.effective_to, 'infinity'::date), coalesce(NEW.effective_to, 'infinity'::date));
        IF NEW.effective_to IS NOT DISTINCT FROM OLD.effective_to OR NOT EXISTS (
            SELECT FROM public.billing_settlementperiod AS period
            WHERE period.status = 'CLOSED' AND period.period_end > first_changed_on
        ) THEN
            RETURN NEW;
        END IF;
    END IF;
    RAISE EXCEPTION USING
        ERRCODE = 'integrity_constraint_violation',
        CONSTRAINT = 'used_version_is_fixed',
        MESSAGE = format('%s %s was used by a posted accrual: %s refused', TG_TABLE_NAME, OLD.id, TG_OP),
        HINT = 'End it by effective_to, after the last closed period, and add another version from that day on.';
END $$;

CREATE FUNCTION public.tollbook_guard_rate() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF (TG_OP <> 'INSERT' AND public.tollbook_is_rate_card_used(OLD.rate_card_id))
       OR (TG_OP <> 'DELETE' AND public.tollbook_is_rate_card_used(NEW.rate_card_id)) THEN
        RAISE EXCEPTION USING
            ERRCODE = 'integrity_constraint_violation',
            CONSTRAINT = 'used_version_is_fixed',
            MESSAGE = format('the rate card was used by a posted accrual: %s of a rate refused', TG_OP),
            HINT = 'End the card by effective_to and add another from that day on.';
    END IF;
    IF TG_OP = 'DELETE' THEN
        RETURN OLD;
    END IF;
    RETURN NEW;
END $$;

CREATE FUNCTION public.tollbook_guard_tenant() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF (NEW.currency <> OLD.currency OR NEW.timezone <> OLD.timezone)
       AND EXISTS (SELECT FROM public.billing_invoice AS invoice WHERE invoice.tenant_id = OLD.id) THEN
        RAISE EXCEPTION USING
            ERRCODE = 'integrity_constraint_violation',
            CONSTRAINT = 'tenant_is_invoiced',
            MESSAGE = format('tenant %s has an invoice: its currency and time zone are fixed', OLD.id),
            HINT = 'Create another tenant for another currency or time zone.';
    END IF;
    RETURN NEW;
END $$;
"""

# table, trigger, events, level, function
TRIGGERS = (
    ("invoice", "guard_change", "INSERT OR UPDATE OR DELETE", "ROW", "guard_invoice"),
    ("invoice", "refuse_truncate", "TRUNCATE", "STATEMENT", "refuse_change"),
    ("invoiceline", "guard_change", "INSERT OR UPDATE OR DELETE", "ROW", "guard_invoice_line"),
    ("invoiceline", "refuse_truncate", "TRUNCATE", "STATEMENT", "refuse_change"),
    ("statement", "guard_change", "UPDATE OR DELETE", "ROW", "guard_statement"),
    ("statement", "refuse_truncate", "TRUNCATE", "STATEMENT", "refuse_change"),
    ("statementline", "guard_change", "INSERT OR UPDATE OR DELETE", "ROW", "guard_statement_line"),
    ("statementline", "refuse_truncate", "TRUNCATE", "STATEMENT", "refuse_change"),
    ("rate", "guard_change", "INSERT OR UPDATE OR DELETE", "ROW", "guard_rate"),
    ("rate", "refuse_truncate", "TRUNCATE", "STATEMENT", "refuse_change"),
    ("ratecard", "guard_change", "UPDATE OR DELETE", "ROW", "guard_dated_version"),
    ("ratecard", "refuse_truncate", "TRUNCATE", "STATEMENT", "refuse_change"),
    ("agreementversion", "guard_change", "UPDATE OR DELETE", "ROW", "guard_dated_version"),
    ("agreementversion", "refuse_truncate", "TRUNCATE", "STATEMENT", "refuse_change"),
    ("contract", "guard_change", "UPDATE OR DELETE", "ROW", "guard_dated_version"),
    ("contract", "refuse_truncate", "TRUNCATE", "STATEMENT", "refuse_change"),
    ("exchangerate", "refuse_change", "UPDATE OR DELETE OR TRUNCATE", "STATEMENT", "refuse_change"),
    ("tenant", "guard_change", "UPDATE", "ROW", "guard_tenant"),
)

CREATE_TRIGGERS = "".join(
    f"CREATE TRIGGER {name} BEFORE {events} ON public.billing_{table}"
    f" FOR EACH {level} EXECUTE FUNCTION public.tollbook_{function}();\n"
    f"ALTER TABLE public.billing_{table} ENABLE ALWAYS TRIGGER {name};\n"
    for table, name, events, level, function in TRIGGERS
)
REMOVE = (
    "".join(f"DROP TRIGGER {name} ON public.billing_{table};\n" for table, name, *_ in TRIGGERS)
    + """
DROP FUNCTION public.tollbook_guard_invoice, public.tollbook_guard_invoice_line, public.tollbook_guard_statement,
    public.tollbook_guard_statement_line, public.tollbook_guard_dated_version, public.tollbook_guard_rate,
    public.tollbook_is_rate_card_used, public.tollbook_guard_tenant;
"""
)


class Migration(migrations.Migration):
    dependencies = [("billing", "0003_ledger_guards")]

    operations = [migrations.RunSQL(FUNCTIONS + CREATE_TRIGGERS, REMOVE)]
