DROP FUNCTION postroad.find_api_key(text);
